"""Defence against reward hacking: mine a run's answers for exploits, propose vetoes, apply them in later stages."""
