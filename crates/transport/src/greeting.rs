//! How two sides find out about each other: the greeting, and what TLS's errors mean to who has to mend them.

use std::io::{Read, Write};
use std::time::Duration;

use rustls::{AlertDescription, CertificateError, InvalidMessage};

use crate::connection::Connection;
use crate::{Error, Result};

/// No TLS record begins like it.
const GREETING: [u8; 8] = *b"tagvisor";
/// What TLS records begin with: their content types (RFC 8446, B.1).
const TLS_RECORDS: std::ops::RangeInclusive<u8> = 0x14..=0x18;

/// The connecting side's part.
pub(crate) fn greet(connection: &mut Connection) -> Result<()> {
    send(connection)?;
    receive(connection)
}

/// The listening side's part. It answers even if it is not greeted: so the peer learns that this is no TLS.
pub(crate) fn answer(connection: &mut Connection) -> Result<()> {
    let received = receive(connection);
    if !matches!(received, Err(Error::Gone { .. } | Error::TimedOut { .. })) {
        send(connection).or_else(|e| received.as_ref().map_or(Ok(()), |()| Err(e)))?;
    }
    received
}

fn send(connection: &mut Connection) -> Result<()> {
    connection
        .write_all(&GREETING)
        .and_then(|()| connection.flush())
        .map_err(|e| Error::from_io(e, connection.peer(), "send"))
}

fn receive(connection: &mut Connection) -> Result<()> {
    let mut received = [0; GREETING.len()];
    let mut len = 0;
    while len < GREETING.len() {
        match connection.read(&mut received[len..]) {
            Ok(0) => {
                return Err(Error::Gone {
                    peer: connection.peer().into(),
                    what: "it greeted",
                });
            }
            Ok(n) => len += n,
            Err(e) => return Err(Error::from_io(e, connection.peer(), "receive")),
        }
        if received[..len] != GREETING[..len] {
            return Err(stranger(connection, received[0]));
        }
    }
    Ok(())
}

fn stranger(connection: &Connection, first: u8) -> Error {
    let peer = connection.peer().into();
    match TLS_RECORDS.contains(&first) && !connection.is_protected() {
        true => Error::PeerWithTls { peer },
        false => Error::NotTagvisor { peer },
    }
}

/// What an error of TLS says about `peer`.
pub(crate) fn verdict(peer: &str, error: rustls::Error) -> Error {
    let peer = peer.into();
    match error {
        rustls::Error::InvalidCertificate(_) | rustls::Error::NoCertificatesPresented => {
            Error::PeerRefused {
                peer,
                why: words(&error),
            }
        }
        rustls::Error::AlertReceived(alert) => match refusal(alert) {
            Some(why) => Error::RefusedByPeer {
                peer,
                why: why.into(),
            },
            None => Error::Tls {
                peer,
                source: error,
            },
        },
        rustls::Error::InvalidMessage(
            InvalidMessage::InvalidContentType | InvalidMessage::UnknownProtocolVersion,
        ) => Error::PeerWithoutTls { peer },
        source => Error::Tls { peer, source },
    }
}

/// Why the peer refuses our certificate, if that is what its alert says.
fn refusal(alert: AlertDescription) -> Option<&'static str> {
    Some(match alert {
        AlertDescription::CertificateRequired | AlertDescription::NoCertificate => {
            "it got none, and wants one"
        }
        AlertDescription::UnknownCA => "it does not know the authority that issued it",
        AlertDescription::DecryptError => {
            "the authority that issued it has another key than the one of that name there"
        }
        AlertDescription::CertificateExpired => {
            "it has expired, or is not valid yet, by the peer's clock"
        }
        AlertDescription::CertificateRevoked => "it was revoked",
        AlertDescription::BadCertificate => "it has another name than expected, or is damaged",
        AlertDescription::UnsupportedCertificate => "it may not be used by this side",
        AlertDescription::CertificateUnknown | AlertDescription::AccessDenied => "it says no more",
        _ => return None,
    })
}

/// What is wrong with a certificate, or with a key.
pub(crate) fn words(error: &rustls::Error) -> String {
    match error {
        rustls::Error::NoCertificatesPresented => "there is none".into(),
        rustls::Error::InvalidCertificate(error) => certificate_words(error),
        other => other.to_string(),
    }
}

fn certificate_words(error: &CertificateError) -> String {
    match error {
        CertificateError::BadEncoding => "it is damaged, or not a certificate of version 3".into(),
        CertificateError::ExpiredContext { time, not_after } => {
            let since = time.as_secs().saturating_sub(not_after.as_secs());
            format!("it expired {} ago", span(since))
        }
        CertificateError::NotValidYetContext { time, not_before } => {
            let until = not_before.as_secs().saturating_sub(time.as_secs());
            format!("it will be valid in {} only", span(until))
        }
        CertificateError::Revoked => "it was revoked".into(),
        CertificateError::BadSignature => {
            "the authority that issued it has another key than the one of that name here".into()
        }
        CertificateError::UnknownIssuer => "none of the authorities issued it".into(),
        CertificateError::NotValidForNameContext {
            expected,
            presented,
        } => match presented.is_empty() {
            true => format!(
                "it has no subjectAltName, and must have {:?}",
                expected.to_str()
            ),
            false => format!(
                "it is for {}, and must be for {:?}",
                presented.join(", "),
                expected.to_str()
            ),
        },
        CertificateError::InvalidPurposeContext { required, .. } => {
            format!("its extendedKeyUsage does not allow {required}")
        }
        other => other.to_string(),
    }
}

/// Seconds, in days if there are more than two.
fn span(seconds: u64) -> String {
    match seconds / 86_400 {
        0..=2 => format!("{:?}", Duration::from_secs(seconds)),
        days => format!("{days} days"),
    }
}
