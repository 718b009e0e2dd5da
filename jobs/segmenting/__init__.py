"""The parts of a job that segments: the actor, its writers, and what limited a run."""
