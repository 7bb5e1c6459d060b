"""Starting and stopping the processes of a run: local supervisor, trainer ranks, engines."""
