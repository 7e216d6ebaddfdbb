//! What a browser does with the answers.
