"""Evaluates a traced program in which some weights are kept in another form."""
