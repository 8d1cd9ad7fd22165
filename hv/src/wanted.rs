//! What the command line asks for: words `name=value`, and the names of scenes.

/// Returns what the command line says of `name`.
pub fn value<'c>(command_line: &'c str, name: &str) -> Option<&'c str> {
    command_line.split_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
}

/// Returns the names of the scenes that are asked for.
pub fn scenes(command_line: &str) -> impl Iterator<Item = &str> + Clone {
    command_line.split_whitespace().filter(|word| !word.contains('='))
}
