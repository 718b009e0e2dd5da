"""A run: the output folder of one bulk job, its plan, record and tables, and what is made of them."""
