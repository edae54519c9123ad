package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

const (
	// cgroupParent holds the cgroups of all containers.
	cgroupParent = "/microvm"
	cgroupMount  = "/sys/fs/cgroup"

	// maxIDLength bounds the ids of containers and execs. containerd's own
	// limit for an id is 76.
	maxIDLength = 128
	// killTimeout is how long the kernel may take to end killed processes.
	killTimeout = 5 * time.Second
)

var validID = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.+-]*$`)

func checkID(id string) error {
	if len(id) > maxIDLength || !validID.MatchString(id) {
		return fmt.Errorf("invalid id %.*q: %w", maxIDLength, id, errdefs.ErrInvalidArgument)
	}
	return nil
}

// cgroupPath is the cgroup of a container, from the root of the hierarchy.
func cgroupPath(id string) string { return cgroupParent + "/" + id }

// container is one container of the sandbox.
type container struct {
	id       string
	lc       *libcontainer.Container
	shared   string   // its part of the shared directory
	storages []string // mount points, in order of mounting
	init     *process
	// sharedMounts are the agent's.
	sharedMounts *sharedMounts

	// running is held while a process is started and while the container is
	// paused or destroyed: what is started in a frozen cgroup stops halfway,
	// and libcontainer waits for it with a lock which the resume would need.
	running sync.Mutex

	volumesMu sync.Mutex
	volumes   map[uint32]*volume // by the number of the mount
	ended     bool               // no volume is opened any more

	mu        sync.Mutex
	resources *specs.LinuxResources
	execs     map[string]*process

	// These are oomWatch's.
	wd    int32
	kills uint64
}

// cgroupDir is the directory of the container's cgroup.
func (c *container) cgroupDir() string { return cgroupMount + cgroupPath(c.id) }

// ownPIDs says whether the container's processes are in a pid namespace of
// their own, so that the kernel ends them all with init.
func (c *container) ownPIDs() bool {
	config := c.lc.Config()
	return config.Namespaces.IsPrivate(configs.NEWPID)
}

// process returns init or an exec.
func (c *container) process(execID string) (*process, error) {
	if execID == "" {
		return c.init, nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	p, ok := c.execs[execID]
	if !ok {
		return nil, fmt.Errorf("exec %q of container %q: %w", execID, c.id, errdefs.ErrNotFound)
	}
	return p, nil
}

// addExec makes room for an exec, or says why there is none.
func (c *container) addExec(p *process) error {
	if c.init.ended() {
		return fmt.Errorf("container %q has ended: %w", c.id, errdefs.ErrFailedPrecondition)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, ok := c.execs[p.execID]; ok {
		return fmt.Errorf("exec %q of container %q: %w", p.execID, c.id, errdefs.ErrAlreadyExists)
	}
	c.execs[p.execID] = p
	return nil
}

// execIDs returns the ids of the execs that are processes, by process id.
func (c *container) execIDs() map[int]string {
	c.mu.Lock()
	defer c.mu.Unlock()
	ids := make(map[int]string)
	for id, p := range c.execs {
		if pid := p.pid.Load(); pid != 0 && !p.ended() {
			ids[int(pid)] = id
		}
	}
	return ids
}

// startInit lets init execute its program.
func (c *container) startInit() error {
	c.running.Lock()
	defer c.running.Unlock()
	if err := c.checkStart(c.init); err != nil {
		return err
	}
	if err := c.lc.Exec(); err != nil {
		return fmt.Errorf("start container process: %w", err)
	}
	c.init.started.Store(true)
	return nil
}

// startExec makes the process of an exec by calling launch.
func (c *container) startExec(p *process, launch func() error) error {
	c.running.Lock()
	defer c.running.Unlock()
	if err := c.checkStart(p); err != nil {
		return err
	}
	p.started.Store(true)
	if err := launch(); err != nil {
		p.abandon()
		return err
	}
	return nil
}

// checkStart says why a process cannot be started now. As runc, it lets execs
// into a container whose init has not been started.
func (c *container) checkStart(p *process) error {
	if p.started.Load() || p.ended() {
		return fmt.Errorf("process was started before: %w", errdefs.ErrFailedPrecondition)
	}
	status, err := c.lc.Status()
	switch {
	case err != nil:
		return fmt.Errorf("read the state of container %q: %w", c.id, err)
	case status == libcontainer.Paused, status == libcontainer.Stopped:
		return fmt.Errorf("container %q is %s: %w", c.id, status, errdefs.ErrFailedPrecondition)
	}
	return nil
}

// pause does nothing for a caller who has given up on it meanwhile.
func (c *container) pause(ctx context.Context) error {
	c.running.Lock()
	defer c.running.Unlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	return stateError(c.lc.Pause())
}

func (c *container) resume() error {
	return stateError(c.lc.Resume())
}

// stateError gives libcontainer's complaints about a container's state their class.
func stateError(err error) error {
	if errors.Is(err, libcontainer.ErrNotRunning) || errors.Is(err, libcontainer.ErrNotPaused) {
		return fmt.Errorf("%w: %w", err, errdefs.ErrFailedPrecondition)
	}
	return err
}

// update changes the container's resources to what the JSON of an OCI
// LinuxResources says.
func (c *container) update(resources []byte) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	merged, err := mergeResources(c.resources, resources)
	if err != nil {
		return err
	}
	fitResources(merged, cgroups.HugePageSizes())
	config := c.lc.Config()
	r, err := cgroupResources(merged, c.id, config.Cgroups.Resources)
	if err != nil {
		return err
	}
	cg := *config.Cgroups
	cg.Resources = r
	config.Cgroups = &cg
	if err := c.lc.Set(config); err != nil {
		return stateError(fmt.Errorf("set the container's resources: %w", err))
	}
	c.resources = merged
	return nil
}

// signalAll sends a signal to every process of the container.
func (c *container) signalAll(sig unix.Signal) error {
	if sig == unix.SIGKILL {
		return c.kill()
	}
	pids, err := c.lc.Processes()
	if err != nil {
		return err
	}
	for _, pid := range pids {
		if err := unix.Kill(pid, sig); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("signal process %d: %w", pid, err)
		}
	}
	return nil
}

// kill ends every process of the container, also of one that is paused.
func (c *container) kill() error {
	err := os.WriteFile(filepath.Join(c.cgroupDir(), "cgroup.kill"), []byte("1"), 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil // no cgroup, no processes
	}
	return err
}

// oomKills returns how many processes of the container the kernel has killed
// for want of memory.
func (c *container) oomKills() (uint64, error) {
	data, err := os.ReadFile(filepath.Join(c.cgroupDir(), "memory.events"))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(data)) {
		if n, ok := strings.CutPrefix(line, "oom_kill "); ok {
			return strconv.ParseUint(strings.TrimSpace(n), 10, 64)
		}
	}
	return 0, errors.New("memory.events has no oom_kill")
}

// deleteExec forgets an exec that has ended or was never started.
func (c *container) deleteExec(p *process) error {
	c.running.Lock()
	defer c.running.Unlock()
	if p.started.Load() && !p.ended() {
		return fmt.Errorf("exec %q is running: %w", p.execID, errdefs.ErrFailedPrecondition)
	}
	p.abandon()
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.execs, p.execID)
	return nil
}

// destroy removes the container, whose init has ended or was never started.
func (c *container) destroy(ctx context.Context) error {
	c.running.Lock()
	defer c.running.Unlock()
	if c.init.started.Load() && !c.init.ended() {
		return fmt.Errorf("container %q is running: %w", c.id, errdefs.ErrFailedPrecondition)
	}
	if err := c.end(ctx); err != nil {
		return err
	}
	if err := c.lc.Destroy(); err != nil {
		return err
	}
	return c.unmount()
}

// unmount unmounts all that was mounted for the container.
func (c *container) unmount() error {
	c.closeVolumes()
	return errors.Join(unmountShares(c.shared), c.sharedMounts.release(c), unmountStorages(c.storages))
}

// end kills all processes of the container and waits until they have ended.
func (c *container) end(ctx context.Context) error {
	if err := c.kill(); err != nil {
		return fmt.Errorf("kill container %q: %w", c.id, err)
	}
	ctx, cancel := context.WithTimeout(ctx, killTimeout)
	defer cancel()
	c.mu.Lock()
	all := []*process{c.init}
	for _, p := range c.execs {
		all = append(all, p)
	}
	c.mu.Unlock()
	for _, p := range all {
		p.abandon()
		select {
		case <-p.exited:
		case <-ctx.Done():
			return fmt.Errorf("wait for the killed container %q: %w", c.id, ctx.Err())
		}
	}
	return nil
}
