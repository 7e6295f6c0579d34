"""What was found, for people: tables in the terminal and one page of HTML."""
