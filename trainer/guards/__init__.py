"""What to do when numbers go wrong: guards, incidents, replays and audits."""
