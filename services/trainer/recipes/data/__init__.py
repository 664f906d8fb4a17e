"""`opd data`: from published prompt sets to the one a run trains on, with a card that accounts for every row."""
