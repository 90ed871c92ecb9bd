"""What proposes tokens: learned drafters (EAGLE, EAGLE-3) and n-grams."""
