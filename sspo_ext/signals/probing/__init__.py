"""Values by probing: the model is made to answer after each of its steps."""
