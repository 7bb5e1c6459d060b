"""Rubric synthesis with models: `megarubric.rubrics.synthesis` joined to engines, endpoints and a judge."""
