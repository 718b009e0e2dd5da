"""The page of a run on this machine, with SQL: a server that only this machine reaches."""
