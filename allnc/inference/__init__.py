"""Trained runs in use: load, predict, export, measure on other images."""
