"""`opd doctor`: looks an installation over and says what to mend. Loads no torch and changes nothing."""
