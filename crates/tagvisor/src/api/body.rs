//! Reading a body: JSON to one of the types of [`model`](super::model) and [`config`](super::config).
//!
//! Fields that the type does not have are let pass if they ask for nothing (`null`, `false`, an empty list), or for what
//! is granted: what Cloud Hypervisor's clients send without wanting it, because it is the default. Any other is refused
//! by its name: what a client asks for it gets, or it is told that it does not.

use serde::de::DeserializeOwned;
use serde_ignored::Path;
use serde_json::Value;

/// A body that asks for what cannot be done, or says nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Invalid {
    /// It is not JSON.
    #[error("the body is not JSON: {0}")]
    NotJson(String),
    /// A field cannot be as it is.
    #[error("`{field}`: {why}")]
    Field {
        /// Which, with all that it is in.
        field: String,
        /// What is wrong with it.
        why: String,
    },
}

/// An error of a field.
pub fn invalid(field: impl Into<String>, why: impl Into<String>) -> Invalid {
    Invalid::Field {
        field: field.into(),
        why: why.into(),
    }
}

/// A field that the type does not have, and those of its values that are all the same to it, as JSON.
pub type Granted = (&'static str, &'static [&'static str]);

/// What a body can be read as.
pub trait Body: DeserializeOwned {
    /// `disks[].sparse` is the field `sparse` of every one of `disks`.
    const GRANTED: &'static [Granted];
}

/// Reads a body.
///
/// # Errors
/// See [`Invalid`].
pub fn read<T: Body>(body: &[u8]) -> Result<T, Invalid> {
    let value = serde_json::from_slice(body).map_err(|e| Invalid::NotJson(e.to_string()))?;
    interpret(&value)
}

/// Reads a body that is JSON.
///
/// # Errors
/// See [`Invalid`].
pub fn interpret<T: Body>(value: &Value) -> Result<T, Invalid> {
    let mut unknown = None;
    let mut note = |path: Path| {
        let field = Field::of(&path, value);
        if unknown.is_none() && !field.is_granted(T::GRANTED) {
            unknown = Some(field.refused());
        }
    };
    let fields = serde_ignored::Deserializer::new(value, &mut note);
    let read = serde_path_to_error::deserialize(fields)
        .map_err(|e| invalid(place(e.path()), e.inner().to_string()))?;
    unknown.map_or(Ok(read), Err)
}

fn place(path: &serde_path_to_error::Path) -> String {
    match path.iter().next() {
        Some(_) => path.to_string(),
        None => "the body".into(),
    }
}

/// A field that the type does not have.
struct Field<'a> {
    /// As in `disks[0].sparse`.
    name: String,
    /// As in `disks[].sparse`.
    kind: String,
    value: &'a Value,
}

impl<'a> Field<'a> {
    fn of(path: &Path, body: &'a Value) -> Self {
        match path {
            Path::Root => Self {
                name: String::new(),
                kind: String::new(),
                value: body,
            },
            Path::Seq { parent, index } => {
                let parent = Self::of(parent, body);
                Self {
                    name: format!("{}[{index}]", parent.name),
                    kind: parent.kind + "[]",
                    value: &parent.value[*index],
                }
            }
            Path::Map { parent, key } => {
                let parent = Self::of(parent, body);
                let dot = if parent.name.is_empty() { "" } else { "." };
                Self {
                    name: format!("{}{dot}{key}", parent.name),
                    kind: format!("{}{dot}{key}", parent.kind),
                    value: &parent.value[key.as_str()],
                }
            }
            Path::Some { parent }
            | Path::NewtypeStruct { parent }
            | Path::NewtypeVariant { parent } => Self::of(parent, body),
        }
    }

    fn is_granted(&self, granted: &[Granted]) -> bool {
        match granted.iter().find(|(kind, _)| *kind == self.kind) {
            Some((_, values)) => self.value.is_null() || values.contains(&&*self.value.to_string()),
            None => asks_for_nothing(self.value),
        }
    }

    fn refused(&self) -> Invalid {
        let value = shortened(self.value);
        invalid(
            &self.name,
            format!("Tagvisor has no such thing, and {value} is asked for"),
        )
    }
}

fn asks_for_nothing(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.values().all(asks_for_nothing),
        _ => false,
    }
}

/// A value for people: no more of it than fits a line.
fn shortened(value: &Value) -> String {
    const LONGEST: usize = 60;
    let text = value.to_string();
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}
