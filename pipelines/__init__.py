"""The life cycle of Medusa heads on Ray: distil, train, calibrate, evaluate, register, promote. Knows nothing of HTTP."""
