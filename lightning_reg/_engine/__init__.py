"""The machinery behind the techniques: base classes, driver, selection, clock, metrics, state, and summary."""
