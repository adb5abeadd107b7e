"""The thin shell around the core: queue, executor, host watchers, timers."""
