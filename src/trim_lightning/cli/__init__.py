"""The commands: arguments in, exit codes and one clear error line out."""
