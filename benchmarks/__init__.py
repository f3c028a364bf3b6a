"""Speed, memory and precision of this library, measured side by side with its peers."""
