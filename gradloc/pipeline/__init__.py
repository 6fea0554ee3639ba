"""Joins the stages: the only room that knows more than one of them."""
