"""`fulgurite demo`: the whole circle on one machine. flow.py drives it; start reading there."""
