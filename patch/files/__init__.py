"""Files and folders that are complete or not there, and strict readers of what others wrote. Knows no model."""
