"""The parts of a job that trains: settings, workers, readers, and the record of a training."""
