"""Devices: one file for each kind, behind one contract (device.py)."""
