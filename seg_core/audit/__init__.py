"""How wrong a run is, and where: a random sample of places, judged by a person or by a truth, and what follows."""
