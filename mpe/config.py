"""What flags and callers choose from. Nothing here needs torch."""

CLASS_COVARIANCES = ("diag", "full", "woodbury")
"""How the classes of an example vary together: see ``mpe.estimates.estimate``."""

STRUCTURES = ("kfac", "diag")
"""Structures of Laplace's posterior."""

ORDERS = {"none": "sequential", "once": "fixed", "epoch": "shuffled"}
"""The values of ``--base_shuffle``, and the order of ``src.datasets.Batches`` that each means."""

SHUFFLES = ("seeded", "replay", "shared")
"""How retrained networks shuffle.

``seeded``: each by a generator of its own, seeded by (seed, what is removed), so that neither the other networks
nor the order of their training matter. ``replay``: by the draws that the papers' scripts made, batch for batch.
``shared``: all by one permutation of all examples, in which removed ones count nothing; this lowers the noise between
networks and saves time, but the batches are not those of training without the removed examples.
"""
