"""The parts of submitting jobs: the cluster's dashboard, what travels with a job, and what is known of jobs."""
