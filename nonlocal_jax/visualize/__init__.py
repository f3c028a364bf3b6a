"""What a non-local block attends to: affinity maps, the pixels behind them, and pictures::

    maps = nl.visualize.affinities(model, variables, clip)         # every block, rows on request
    nl.visualize.arrows(maps["nonlocal_res4_5"], clip, (2, 7, 7))  # what one position attends to
    nl.visualize.explore(maps, clip, "explore.html")               # every position, in a browser

Matplotlib is imported when the first picture is drawn.
"""

from nonlocal_jax.visualize import measures
from nonlocal_jax.visualize.affinity_map import AffinityMap
from nonlocal_jax.visualize.charts import query_dependence, time_by_time
from nonlocal_jax.visualize.geometry import GeometryError, Pixels
from nonlocal_jax.visualize.maps import NoBlocksError, affinities
from nonlocal_jax.visualize.movie import animate
from nonlocal_jax.visualize.page import explore
from nonlocal_jax.visualize.pictures import arrows, entropy, heatmap, received
from nonlocal_jax.visualize.scene import from_pixels, to_pixels

__all__ = [
    "AffinityMap",
    "GeometryError",
    "NoBlocksError",
    "Pixels",
    "affinities",
    "animate",
    "arrows",
    "entropy",
    "explore",
    "from_pixels",
    "heatmap",
    "measures",
    "query_dependence",
    "received",
    "time_by_time",
    "to_pixels",
]
