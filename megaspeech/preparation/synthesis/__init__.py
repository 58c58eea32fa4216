"""Speech from text by synthesizers that pip installs, with the true times of its words: espeak-ng and Open JTalk."""
