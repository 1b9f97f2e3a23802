//! The machine that a command means.

use std::path::Path;

use crate::api::client::{self, Client};
use crate::name::{self, Running};

/// Why a machine was not asked, or did not do what it was.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is none of that name.
    #[error("there is no machine `{name}`: {}", those_there_are(.others))]
    NoSuch {
        /// The name.
        name: String,
        /// Those that run.
        others: Vec<String>,
    },
    /// The runtime directory or the name cannot be used.
    #[error(transparent)]
    Name(#[from] name::Error),
    /// It was asked in vain.
    #[error("machine `{name}`: {source}")]
    Asked {
        /// The name.
        name: String,
        /// What became of it.
        source: client::Error,
    },
}

fn those_there_are(names: &[String]) -> String {
    match names {
        [] => "none runs; start one with `tagvisor run`".into(),
        [only] => format!("`{only}` runs"),
        names => format!("those that run are `{}`", names.join("`, `")),
    }
}

/// A machine that runs.
#[derive(Debug)]
pub struct Machine {
    /// Its name, or the path of its socket.
    pub name: String,
    /// What asks it.
    pub client: Client,
    /// What it has in the runtime directory, if it was named.
    pub running: Option<Running>,
}

impl Machine {
    /// The machine that a user calls `name`.
    ///
    /// # Errors
    /// There is none.
    pub fn find(name: &str) -> Result<Self, Error> {
        Self::find_in(&name::runtime_directory(), name)
    }

    /// The machine that a user calls `name`, among those in `runtime`.
    ///
    /// # Errors
    /// There is none.
    pub fn find_in(runtime: &Path, name: &str) -> Result<Self, Error> {
        if name.contains('/') {
            return Ok(Self {
                name: name.into(),
                client: Client::new(name),
                running: None,
            });
        }
        if let Some(running) = Running::find(runtime, name)? {
            return Ok(running.into());
        }
        let others = Running::all(runtime)?;
        Err(Error::NoSuch {
            name: name.into(),
            others: others.into_iter().map(|running| running.name).collect(),
        })
    }

    /// Asks it for something.
    ///
    /// # Errors
    /// With its name.
    pub fn ask<T>(
        &self,
        question: impl FnOnce(&Client) -> Result<T, client::Error>,
    ) -> Result<T, Error> {
        question(&self.client).map_err(|source| Error::Asked {
            name: self.name.clone(),
            source,
        })
    }
}

impl From<Running> for Machine {
    fn from(running: Running) -> Self {
        Self {
            name: running.name.clone(),
            client: Client::new(running.socket()),
            running: Some(running),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};

    use super::*;

    fn runtime_with(names: &[&str]) -> (tempfile::TempDir, Vec<File>) {
        let runtime = tempfile::tempdir().unwrap();
        let locks = names.iter().map(|name| {
            fs::create_dir(runtime.path().join(name)).unwrap();
            let lock = File::create(runtime.path().join(name).join("lock")).unwrap();
            lock.lock().unwrap();
            lock
        });
        let locks = locks.collect();
        (runtime, locks)
    }

    fn message(names: &[&str], name: &str) -> String {
        let (runtime, _locks) = runtime_with(names);
        Machine::find_in(runtime.path(), name)
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn who_names_no_machine_is_told_which_there_are() {
        assert_eq!(
            message(&[], "web"),
            "there is no machine `web`: none runs; start one with `tagvisor run`"
        );
        assert_eq!(
            message(&["db"], "web"),
            "there is no machine `web`: `db` runs"
        );
        assert_eq!(
            message(&["db", "cache"], "web"),
            "there is no machine `web`: those that run are `cache`, `db`"
        );
        assert!(message(&[], "..").starts_with("name `..`"));
    }

    #[test]
    fn a_name_with_a_slash_is_the_path_of_a_socket() {
        let machine = Machine::find_in(Path::new("/nonexistent"), "./none/api.sock").unwrap();
        let error = machine.ask(Client::pause).unwrap_err().to_string();
        assert_eq!(
            error,
            "machine `./none/api.sock`: no VMM listens at ./none/api.sock"
        );
    }
}
