"""The actor that segments, part by part: guard, reading, device, batches, seams, publishing, receipts; bottleneck."""
