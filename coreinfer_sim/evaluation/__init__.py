"""Quality under forced sparse decode, beside what one would take instead."""
