"""Teacher engines: one protocol, and a model runner behind it."""

from logitcache_pipeline.engines.base import ScoringRequest, Teacher, load_teacher

__all__ = ["ScoringRequest", "Teacher", "load_teacher"]
