"""Everything that trains drafters. Never imports SGLang; the engine never imports this."""
