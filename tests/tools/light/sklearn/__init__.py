"""Stands before scikit-learn on the path where importing that takes most of a minute, as under emulation."""
