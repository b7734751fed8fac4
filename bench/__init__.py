"""``python -m bench``: what perturbed layers cost beside torch's own ways to do the same."""
