"""Evaluation that cannot flatter: forced sparse decode, on rows that the index has not seen, beside the baselines."""
