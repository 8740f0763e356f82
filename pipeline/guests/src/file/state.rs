//! State files as sections of guest state: one each, named by its id. In the setup part the sections are empty and only
//! announce the files to come. A section is the file's bytes as they are: there is nothing to encode.

use memferry_stages::untrusted::listed;

use super::settings::Image;
use memferry::guest::{GuestError, GuestState, StateSection};

/// The largest state file. A larger file is memory.
pub(super) const MAX_STATE_FILE_BYTES: u64 = 16 << 20;

const VERSION: u32 = 1;

pub(super) fn section(id: &str, bytes: Vec<u8>) -> StateSection {
    StateSection { name: id.into(), version: VERSION, bytes }
}

/// The section of each file, in the order of the files. If they do not match, the error lists the received files and
/// the configured ones. `part` is the part of the state: setup or device.
pub(super) fn of_files<'state>(
    part: &str,
    state: &'state GuestState,
    files: &[Image],
) -> Result<Vec<&'state StateSection>, GuestError> {
    let is_of = |section: &&StateSection, file: &Image| section.name == file.id && section.version == VERSION;
    let section = |file: &Image| state.sections.iter().find(|section| is_of(section, file));
    let found: Option<Vec<_>> = files.iter().map(section).collect();
    found.filter(|found| found.len() == state.sections.len()).ok_or_else(|| {
        let came = listed(state.sections.iter().map(|section| &section.name));
        let own: Vec<_> = files.iter().map(|file| &file.id).collect();
        GuestError(format!(
            "{part} state [{came}] came, there are state_files for {own:?}: each needs its file, unless the source is \
             another kind of guest"
        ))
    })
}
