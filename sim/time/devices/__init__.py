"""What devices were measured to do: how kernels use their processors, and the published rows that the cost
model is held to.
"""
