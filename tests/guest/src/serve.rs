//! The guest's end of the fault channel: takes what came, has it repaired, answers.

use crate::{
    calls::{demand, wait_interrupted},
    ensure, machine,
    memory::Window,
    say,
    say::Failed,
};
use channel::{
    Call, Code,
    call::ARRAY,
    guest::{Frames, Guest},
    record::{Event, Request},
    ring::{CONSUMER, FRAMES},
};
use heapless::Vec;
use iommu::PAGE_SIZE;

/// Most pages of a group: no operation of the test device touches more.
const GROUP_PAGES: usize = 16;

/// The frames of the channel, one after the other.
struct Mapped(Window);

impl Frames for Mapped {
    fn load(&self, frame: usize, word: usize) -> u64 {
        self.0.read64(offset(frame, word))
    }

    fn store(&self, frame: usize, word: usize, value: u64) {
        self.0.write64(offset(frame, word), value);
    }
}

fn offset(frame: usize, word: usize) -> u64 {
    frame as u64 * PAGE_SIZE + word as u64 * 8
}

/// A group of page requests, whole.
pub struct Group {
    /// What to answer with.
    pub cookie: u64,
    /// Its requests, one for each page, in the order of the records.
    pub requests: Vec<Request, GROUP_PAGES>,
}

/// An answer to a group, as it lies in memory.
#[repr(C)]
pub struct Answer {
    /// Of the group.
    pub cookie: u64,
    /// A [`Code`], or what is to be refused.
    pub code: u64,
}

impl Group {
    /// Returns the answer `code` to it.
    pub fn answer(&self, code: Code) -> Answer {
        Answer { cookie: self.cookie, code: code as u64 }
    }
}

/// What became of answers.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Answered {
    /// How many the hypervisor looked at.
    pub handled: u64,
    /// How many of those it refused.
    pub refused: u64,
}

/// The guest's end of the channel, and a count of what came through it.
pub struct Server {
    channel: Guest<Mapped>,
    window: Window,
    /// Groups taken.
    pub groups: u64,
    /// Events taken.
    pub events: u64,
}

impl Server {
    /// Opens the channel.
    pub fn open() -> Result<Self, Failed> {
        let [base, ..] = demand(Call::OpenChannel, [0; 4])?;
        let Some(window) = Window::new(base, FRAMES as u64 * PAGE_SIZE) else {
            say!("the guest cannot use {base:#x} as its channel");
            return Err(Failed);
        };
        let Some(channel) = Guest::open(Mapped(window)) else {
            say!("what is at {base:#x} is no channel of this version");
            return Err(Failed);
        };
        Ok(Self { channel, window, groups: 0, events: 0 })
    }

    /// Returns where the channel is.
    pub fn window(&self) -> &Window {
        &self.window
    }

    /// Returns the addresses of the channel's frames that the guest may only read.
    pub fn read_only_frames(&self) -> impl Iterator<Item = u64> {
        (0..CONSUMER).map(|frame| self.window.base() + offset(frame, 0))
    }

    /// Takes the next group, if there is one.
    pub fn next_group(&mut self) -> Result<Option<Group>, Failed> {
        let Some(first) = self.channel.next_request() else { return Ok(None) };
        let Request { cookie, pages, .. } = first;
        let mut requests = Vec::new();
        let mut next = Some(first);
        for index in 0..pages {
            // A group becomes visible whole, and its records follow one another.
            let fits = next.filter(|next| *next == Request { index, iova: next.iova, ..first });
            ensure!(
                fits.is_some_and(|next| requests.push(next).is_ok()),
                "bad page {index} of group {cookie:#x}"
            );
            next = if index + 1 < pages { self.channel.next_request() } else { None };
        }
        ensure!(!requests.is_empty(), "group {cookie:#x} has no pages");
        self.groups += 1;
        Ok(Some(Group { cookie, requests }))
    }

    /// Waits for the next group.
    pub fn wait_group(&mut self) -> Result<Group, Failed> {
        wait_interrupted(|| self.next_group())?.ok_or_else(|| {
            say!("no page request came, and no interrupt");
            Failed
        })
    }

    /// Takes the next event, if there is one.
    pub fn next_event(&mut self) -> Option<Event> {
        let event = self.channel.next_event();
        self.events += u64::from(event.is_some());
        event
    }

    /// Returns how many events were lost at least.
    pub fn events_lost(&self) -> u64 {
        self.channel.events_lost()
    }

    /// Waits for the next event.
    pub fn wait_event(&mut self) -> Result<Event, Failed> {
        wait_interrupted(|| Ok(self.next_event()))?.ok_or_else(|| {
            say!("no event came, and no interrupt");
            Failed
        })
    }

    /// Checks that the channel has interrupted the guest at least once. Whatever is in it was announced when it came.
    pub fn expect_interrupt(&self) -> Result<(), Failed> {
        ensure!(machine::interrupts() > 0, "the channel has a record and sent no interrupt");
        Ok(())
    }

    /// Waits for the next group, and goes on until `groups` were taken, repaired by `repair` and answered as that says.
    ///
    /// What has come by then is answered at once.
    pub fn serve(
        &mut self,
        groups: u64,
        mut repair: impl FnMut(&Group) -> Result<Code, Failed>,
    ) -> Result<(), Failed> {
        let end = self.groups + groups;
        while self.groups < end {
            let mut answers = Vec::<Answer, { ARRAY as usize }>::new();
            let mut next = Some(self.wait_group()?);
            while let Some(group) = next.take() {
                let code = repair(&group)?;
                ensure!(answers.push(group.answer(code)).is_ok(), "more than {ARRAY} groups at once");
                if self.groups < end && !answers.is_full() {
                    next = self.next_group()?;
                }
            }
            answer_all(&answers)?;
        }
        Ok(())
    }
}

/// Gives `answers`, of which some may be refused.
pub fn respond(answers: &[Answer]) -> Result<Answered, Failed> {
    let array = answers.as_ptr().addr() as u64;
    demand(Call::Respond, [array, answers.len() as u64, 0, 0])
        .map(|[handled, refused, _]| Answered { handled, refused })
}

/// Gives `answers`, of which none may be refused.
pub fn answer_all(answers: &[Answer]) -> Result<(), Failed> {
    let answered = respond(answers)?;
    let expected = Answered { handled: answers.len() as u64, refused: 0 };
    ensure!(answered == expected, "of {} answers: {answered:?}", answers.len());
    Ok(())
}
