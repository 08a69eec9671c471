"""Convolutions as matrix products, with prologues and epilogues."""
