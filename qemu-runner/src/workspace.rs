//! Where things are: the workspace, its build directory, and what the runner keeps in it.

use std::{
    env,
    ffi::OsString,
    fs::{self, File, TryLockError},
    path::{Path, PathBuf},
    process::{self, Command},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use serde::Deserialize;

use crate::{
    error::Error,
    process::{checked, say},
};

/// Limit for asking cargo where things are; far beyond the tenth of a second that it takes.
const METADATA_LIMIT: Duration = Duration::from_secs(60);

/// The workspace and the runner's own directory in it.
#[derive(Debug)]
pub(crate) struct Workspace {
    /// Directory of the root manifest.
    pub(crate) root: PathBuf,
    /// `portcullis` in cargo's build directory: what was fetched, made and reported.
    pub(crate) kept: PathBuf,
}

/// The part of `cargo metadata` that is used.
#[derive(Deserialize)]
struct Metadata {
    workspace_root: PathBuf,
    target_directory: PathBuf,
}

impl Workspace {
    /// Asks cargo for the workspace that this program was built from.
    pub(crate) fn locate() -> Result<Self, Error> {
        let mut command = Command::new(cargo());
        command
            .args(["metadata", "--no-deps", "--offline", "--format-version=1"])
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .env("RUSTUP_AUTO_INSTALL", "0");
        let metadata: Metadata =
            serde_json::from_str(&checked(&mut command, METADATA_LIMIT)?).map_err(|reason| {
                Error::Program { program: "cargo metadata".into(), said: reason.to_string() }
            })?;
        let kept = metadata.target_directory.join("portcullis");
        fs::create_dir_all(&kept).map_err(Error::io("creating", &kept))?;
        Ok(Self { root: metadata.workspace_root, kept })
    }

    /// Waits until no other runner provisions or builds here; the lock is held until the file is dropped.
    pub(crate) fn lock(&self) -> Result<File, Error> {
        let path = self.kept.join("lock");
        let file = File::create(&path).map_err(Error::io("creating", &path))?;
        let locked = match file.try_lock() {
            Ok(()) => Ok(()),
            Err(TryLockError::WouldBlock) => {
                say("another runner fetches or builds here; waiting for it");
                file.lock()
            }
            Err(TryLockError::Error(error)) => Err(error),
        };
        locked.map_err(Error::io("locking", &path))?;
        Ok(file)
    }
}

/// Returns the cargo that started this program, or the one that `PATH` names.
pub(crate) fn cargo() -> OsString {
    env::var_os("CARGO").unwrap_or_else(|| "cargo".into())
}

/// A directory for the files of one boot, removed when this value goes, unless they are to be kept.
#[derive(Debug)]
pub(crate) struct BootDirectory {
    path: PathBuf,
    keep: bool,
}

impl BootDirectory {
    /// Creates a directory of a new name below `kept`.
    pub(crate) fn create(kept: &Path, machine: &str, keep: bool) -> Result<Self, Error> {
        static COUNT: AtomicU32 = AtomicU32::new(1);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = kept.join("boots").join(format!("{machine}-{}-{count}", process::id()));
        // What an earlier process of the same number left behind is of no use to anyone.
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).map_err(Error::io("creating", &path))?;
        Ok(Self { path, keep })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for BootDirectory {
    fn drop(&mut self) {
        if !self.keep {
            // A leftover costs a little disk, and `cargo clean` removes it.
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_workspace_is_the_one_that_holds_this_package() {
        let workspace = Workspace::locate().unwrap();

        assert!(workspace.root.join("qemu-runner/Cargo.toml").is_file());
        assert!(workspace.kept.ends_with("portcullis"));
    }

    #[test]
    fn the_files_of_a_boot_go_unless_they_are_kept() {
        let kept = Workspace::locate().unwrap().kept;
        let (goes, stays) =
            [false, true].map(|keep| BootDirectory::create(&kept, "test", keep).unwrap()).into();
        let paths = [goes.path().to_owned(), stays.path().to_owned()];

        drop((goes, stays));

        assert!(!paths[0].exists() && paths[1].exists());
        fs::remove_dir_all(&paths[1]).unwrap();
    }
}
