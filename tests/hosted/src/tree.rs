//! Flattened device trees, made from nodes and properties as the Devicetree Specification lays them out.

/// A node: its name, its properties, the nodes in it.
#[derive(Clone, Debug)]
pub struct Node {
    name: &'static str,
    properties: Vec<(&'static str, Vec<u8>)>,
    children: Vec<Node>,
}

impl Node {
    /// A node without anything in it.
    pub fn new(name: &'static str) -> Self {
        Self { name, properties: Vec::new(), children: Vec::new() }
    }

    /// Adds a property of these bytes, or puts them in the place of what it was.
    #[must_use]
    pub fn bytes(mut self, name: &'static str, bytes: &[u8]) -> Self {
        self.properties.retain(|(other, _)| *other != name);
        self.properties.push((name, bytes.to_vec()));
        self
    }

    /// Adds a property of cells.
    #[must_use]
    pub fn cells(self, name: &'static str, cells: &[u32]) -> Self {
        let bytes: Vec<u8> = cells.iter().flat_map(|cell| cell.to_be_bytes()).collect();
        self.bytes(name, &bytes)
    }

    /// Adds a property of texts.
    #[must_use]
    pub fn texts(self, name: &'static str, texts: &[&str]) -> Self {
        let bytes: Vec<u8> = texts.iter().flat_map(|text| [text.as_bytes(), &[0]].concat()).collect();
        self.bytes(name, &bytes)
    }

    /// Adds a property that is there or not.
    #[must_use]
    pub fn flag(self, name: &'static str) -> Self {
        self.bytes(name, &[])
    }

    /// Takes a property away.
    #[must_use]
    pub fn without(mut self, name: &str) -> Self {
        self.properties.retain(|(other, _)| *other != name);
        self
    }

    /// Adds a node in it.
    #[must_use]
    pub fn child(mut self, node: Node) -> Self {
        self.children.push(node);
        self
    }

    fn write(&self, structure: &mut Vec<u8>, strings: &mut Vec<u8>) {
        // FDT_BEGIN_NODE, FDT_PROP, FDT_END_NODE; all is aligned to a word.
        let align = |bytes: &mut Vec<u8>| bytes.resize(bytes.len().next_multiple_of(4), 0);
        structure.extend(1u32.to_be_bytes());
        structure.extend(self.name.bytes());
        structure.push(0);
        align(structure);
        for (name, value) in &self.properties {
            let place = strings.len() as u32;
            strings.extend(name.bytes());
            strings.push(0);
            for word in [3, value.len() as u32, place] {
                structure.extend(word.to_be_bytes());
            }
            structure.extend(value);
            align(structure);
        }
        for child in &self.children {
            child.write(structure, strings);
        }
        structure.extend(2u32.to_be_bytes());
    }

    /// Returns the tree of which it is the root.
    pub fn tree(&self) -> Vec<u8> {
        const HEADER: u32 = 40;
        const RESERVATIONS: u32 = 16;
        let (mut structure, mut strings) = (Vec::new(), Vec::new());
        self.write(&mut structure, &mut strings);
        structure.extend(9u32.to_be_bytes());
        let at = HEADER + RESERVATIONS;
        let [size, names] = [structure.len() as u32, strings.len() as u32];
        // Magic, length, structure, strings, reservations, version, compatible with, CPU, size of strings, of structure.
        let header = [0xD00D_FEED, at + size + names, at, at + size, HEADER, 17, 16, 0, names, size];
        let mut tree: Vec<u8> = header.iter().flat_map(|word| word.to_be_bytes()).collect();
        tree.resize(at as usize, 0);
        tree.extend(structure);
        tree.extend(strings);
        tree
    }
}
