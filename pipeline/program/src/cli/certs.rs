//! `memferry certs`: certificates for a trial of TLS.

use std::path::Path;
use std::process::ExitCode;

use memferry_stages::untrusted::Untrusted;
use memferry_transports_tls::trial;

use super::verdict::{DONE, FAILED};
use super::{complain, print};

/// Makes an authority and a certificate for each end in a directory.
pub(super) fn make(directory: &Path, hosts: &[String]) -> ExitCode {
    let shown = Untrusted::from(directory);
    match trial::write(directory, hosts) {
        Ok(()) => print(
            &format!(
                "made in {shown}: ca-cert.pem, server-cert.pem, server-key.pem, client-cert.pem, client-key.pem\n\n\
                 Both ends use it, each on its own host:\n\n    [transport.tls]\n    directory = \"{shown}\"\n\n\
                 These are for trials: they hold for 90 days, whoever has the directory can be either end, and the authority's key is \
                 not kept, so no more can be made. For anything else use certificates of an authority that you run."
            ),
            DONE,
        ),
        Err(error) => complain(&error.to_string(), FAILED),
    }
}
