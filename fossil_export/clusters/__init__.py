"""A merge on many machines: the files of a plan divided among the workers of a cluster."""

from fossil_export.clusters._merge import Cluster, merge_on_ray

__all__ = ["Cluster", "merge_on_ray"]
