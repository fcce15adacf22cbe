"""What runs the techniques: their base classes, the driver, selection, schedules' clock, metrics, state and the summary."""
