"""CCT-R (P2): contrastive cross-teaching with registration."""
