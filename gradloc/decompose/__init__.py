"""From evidence to blocks.

*Structural*: a chain's masks may already fall apart into *components* (`graph`); if not, its units are *partitioned* so
that most evidence lies inside blocks (`partition`), and a *shuffle null* says how much would by chance (`significance`);
`structural` joins the three into a plan with a verdict. *Conditional*: units that fire for the same tokens are *clustered*
(`firing_clusters`), and held-out tokens say what picking a few clusters captures (`conditional`).
"""
