"""Speed and memory, each claim side by side with what it is compared to."""
