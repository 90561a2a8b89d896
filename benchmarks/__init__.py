"""Benchmarks of nbnorm for asv and by hand; README.md says how to run and read them."""
